// The kernels for AVX-512.
#include "kernels_avx512.h"

namespace kvern {
const Kernels kAvx512Kernels = kernels<Avx512>("avx512");
}
