"""Training: data (vocabulary, masking, sentence pairs), pre-training and fine-tuning."""
