"""What a replica on several cards would do: time, memory and traffic of a clip, reckoned for any layout."""
