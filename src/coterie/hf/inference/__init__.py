"""What the engine does for a running model beside its experts: attention and its cache, norms, whole layers."""
