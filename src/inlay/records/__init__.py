"""What was made from what: fingerprints of bases, manifests of results."""
