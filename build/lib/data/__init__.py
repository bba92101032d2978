"""The way of the data: official sources -> WebDataset shards in storage -> a verified local cache -> batches."""
