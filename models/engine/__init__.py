"""The machinery under the adapters: towers, decoders, requests, levels, masks."""
