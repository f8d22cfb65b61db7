"""Methods that write a change of weights directly, or work it out in several phases."""
