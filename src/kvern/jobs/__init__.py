"""Work that goes on by itself and outlives the process: batches. It is handed what asks the model."""
