"""Evaluation of models and baselines on real files: sizes are those of whole files, pictures are decoded from them.

Read in this order:

    evaluate   the job, and how images are measured
    photos     the images
    curves     points, curves, BD-rates
    gate       whether models are as good as in an earlier evaluation
    pictures   originals beside decoded pictures
    report     CSV, Markdown and report.html
    plots      figures

This package knows model, codec and reference, but not training.

.. include:: README.md
"""
