"""SAR in LLaMA-Factory, without a fork: ``sar-fast llamafactory train`` (docs/integrations/llamafactory.md).

Its own parser reads the command line, its own SFT trains. What is added goes in where it takes callbacks, and, for the
control group, as a subclass of the Trainer that it makes.
"""
