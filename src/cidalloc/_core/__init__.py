"""The C level of the allocator, as inline functions in .pxd files; _alloc.pxd offers them."""
