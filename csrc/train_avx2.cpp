#include "train_body.h"

namespace kvern {
const TrainKernels kAvx2Train = kTrainKernels;
}
