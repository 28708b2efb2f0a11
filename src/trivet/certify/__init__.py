"""What can be proved about a model: certificates, each with its confidence and its conditions."""
