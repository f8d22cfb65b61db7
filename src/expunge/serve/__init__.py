"""`expunge serve`: a subject with its deltas and guards, or guards in front of another server, as an OpenAI-compatible
endpoint."""
