"""What may go wrong: perturbation sets (`ThreatModel`), and the attacks that search them (`Attack`)."""
