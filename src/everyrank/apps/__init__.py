"""The programs that everyrank ships."""
