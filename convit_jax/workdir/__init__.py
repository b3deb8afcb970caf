"""The folder of a run: `folder` has every path in it, and the other modules its contents."""
