"""The unified model: a BAGEL Mixture-of-Transformers decoder, its checkpoint format, tokenizer and contexts."""
