"""Text in, token ids out, and back: messages, chat template, tokenizer, incremental detokenizer, stops. No torch."""
