"""unigrpo: an open, reproducible implementation of UniGRPO (arXiv 2603.23500).

One policy writes its thinking (text tokens, GRPO) and then draws the image (flow matching, Flow-GRPO); the whole
prompt -> thinking -> image sequence is one Markov decision process with one reward at its end.
"""

__version__ = "0.1.0"
