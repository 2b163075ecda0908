"""The way of a shard: decoded, through the backbone, encoded, written; in this process or in workers of Dask."""
