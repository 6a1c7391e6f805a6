"""What comes in: models, adapters, pictures, prompts, tables; and content stamps that tell them apart."""
