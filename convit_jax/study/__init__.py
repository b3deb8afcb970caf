"""The paper's study of locality: lists of runs, the runs one after another, tables and pictures."""
