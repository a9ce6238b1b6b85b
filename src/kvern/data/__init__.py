"""Training data: documents as they are, as token ids on disk, as packed rows whose order hangs on the seed alone."""
