// The one source of a target whose only product is its precompiled header.
