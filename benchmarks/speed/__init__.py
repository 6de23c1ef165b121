"""What guarding costs, as ratios measured in one run on the same weights, images and threads."""
