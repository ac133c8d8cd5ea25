"""The digit world: a small, self-contained world in which token pruning behaves as in the papers.

Scenes of coloured handwritten digits, questions in the schemas of the public benchmarks, and a small but
genuine ``LlavaForConditionalGeneration`` trained on them. Nothing here is downloaded.
"""
