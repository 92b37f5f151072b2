"""What is true of a client's rows as a whole? Attacks that tell clients apart by what they have most of."""
