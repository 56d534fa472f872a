"""Record sets that come with the package. All people, firms and places in them are invented."""
