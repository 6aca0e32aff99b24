"""What a configuration will cost, from the architecture alone: bytes, memory, operations, steps."""
