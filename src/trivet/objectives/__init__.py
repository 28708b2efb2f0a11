"""What is minimised: one file per paper, all returning per-example losses."""
