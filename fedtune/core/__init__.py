"""What every method and transport shares: types, wire format, ledger, seeds and the one round loop."""
