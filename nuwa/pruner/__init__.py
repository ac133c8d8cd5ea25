"""Training of LearnPruner's module (LPM) end to end through a frozen vision-language model.

``learner.py``: dropping with a straight-through estimator. ``conversations.py``: training images and their questions.
``train.py``: the recipe. Inference is :mod:`nuwa.stage1.learnpruner`.
"""
