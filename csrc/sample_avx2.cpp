#include "sample_body.h"

namespace kvern {
const SampleKernels kAvx2Sample = kSampleKernels;
}
