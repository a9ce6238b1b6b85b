// Whether the structs of kvern_layer.h can be computed with: no pointer missing, no size that would read past a buffer.
#pragma once

#include "kvern_layer.h"

namespace kvern {

bool fits(const kvern_packed& w);
bool fits(const kvern_layer& layer);
bool has_sound_books(const kvern_step& step);
bool is_sound(const kvern_layer& layer, const kvern_step& step);  // slots and buffers as well

}  // namespace kvern
