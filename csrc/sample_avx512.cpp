#include "sample_body.h"

namespace kvern {
const SampleKernels kAvx512Sample = kSampleKernels;
}
