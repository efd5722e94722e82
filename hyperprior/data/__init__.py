"""From sources to patches: which images a run sees, in which order, and where each is cut.

Read in this order:

    tars       reads tars in place: their members, and whether they are complete
    shards     sources (tars, nested tars, directories, URLs) → shards → samples
    lanes      the order of samples: a pure function of the seed and of positions
    splits     training, validation and test, by a hash of the key
    patches    the part of an image that training or validation sees
    stream     lanes → batches: a thread pool, cursors, skipping
    inspect    the content of sources (`hyperprior inspect`)
    pack       WebDataset shards of equal length (`hyperprior pack`)

No module here knows the model. Sources raise DataError, and ConfigError for text that names none. `samples()` gives the
same samples at each call.

.. include:: README.md
"""
