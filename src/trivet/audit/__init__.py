"""What is measured on a finished model: attacks, proofs and costs become findings, claims and a report."""
