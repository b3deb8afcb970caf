"""What the host does to an image: `decode` reads it, `transforms` crops and augments it."""
