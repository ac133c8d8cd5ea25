"""MLflow, a view of the sweep that can be replayed; the Parquet files are the record."""
