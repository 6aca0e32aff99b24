"""What the one-shot paper's theory speaks of, measured: L, τ, Γ, the bound, and the error of Eq. 7 itself."""
