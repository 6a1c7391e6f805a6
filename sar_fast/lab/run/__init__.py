"""What every experiment does around its work: flags, folders of results, processes, metadata."""
