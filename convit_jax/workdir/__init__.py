"""The workdir, the folder of a run: `folder` names its files, other modules read and write them."""
