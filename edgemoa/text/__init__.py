"""Between text and tokens: what the files of a model folder say, without loading the model."""
