#include "train_body.h"

namespace kvern {
const TrainKernels kAvx512Train = kTrainKernels;
}
