"""From images to batches: `chunks` has the order of the images, `workers` makes them ahead."""
