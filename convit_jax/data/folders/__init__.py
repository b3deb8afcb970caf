"""Class folders: `class_folders` opens them, `layouts` finds the splits, `listing` the files."""
