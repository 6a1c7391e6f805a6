"""When SAR helps: models that fine-tuning taught to lean on words, asked where words mislead (docs/does-it-help.md)."""
