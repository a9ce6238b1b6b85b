// Whether the structs of kvern_layer.h can be computed with: no pointer missing, no size that would read past a buffer.
#pragma once

#include <initializer_list>

#include "kvern_layer.h"

namespace kvern {

// Whether memory can hold so many numbers: no size negative, and the product, with what it is rounded up by, far from
// where 64 bits overflow.
bool is_addressable(std::initializer_list<int64_t> sizes);

bool fits(const kvern_packed& w);
bool fits(const kvern_layer& layer);
bool can_multiply(const kvern_packed& w, int64_t m, int activations);
bool has_sound_books(const kvern_step& step);
bool is_sound(const kvern_layer& layer, const kvern_step& step);  // slots and buffers as well
bool are_alike(const kvern_layer& a, const kvern_layer& b);       // one step, and caches of one shape, suit both

}  // namespace kvern
