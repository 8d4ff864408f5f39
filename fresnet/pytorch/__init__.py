"""What PyTorch keeps private or lacks: the transform stack, collectives, the allocator."""
