#include "sample_body.h"

namespace kvern {
const SampleKernels kScalarSample = kSampleKernels;
}
