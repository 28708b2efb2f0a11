"""How records are protected: from per-example losses to an update, and what it spends."""
