"""The training job. It trains a run directory from a config, and resumes it after every stop.

Read in this order:

    loop         the job: resume, train, validate, save checkpoints, stop, and measure the result
    steps        the graph: n training steps in one call
    optimizer    the weights in training: Adam, its learning rate, and the moving average
    distribute   devices and workers: lanes of the batch, sums over workers, checks that workers agree
    stop         stop requests: signals, and the flag that every step reads
    timetable    the length of a run, and the steps at which something is due
    feed         the batches of each call
    calls        calls of the graph, two in flight
    resume       the state in a checkpoint, and the checks that it fits
    checkpoint   checkpoint files: the last few steps and the best weights
    validation   means over held-out images
    progress     reports while a run trains
    export       writes a model directory from a run
    info         the facts about a file, a model or a run (`hyperprior info`)
    runs         lists, compares and describes runs
    sweep        one run for each lambda, or a search for the lambda of a wanted rate

It uses data, model, codec, reference and watch. It does not use evaluation.

.. include:: README.md
"""
