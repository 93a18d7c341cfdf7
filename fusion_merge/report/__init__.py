"""What a run leaves behind: tables, pictures, and a written report."""
